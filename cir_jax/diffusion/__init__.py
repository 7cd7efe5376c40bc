"""The Gaussian diffusion of CompoDiff: noise schedules and samplers."""
