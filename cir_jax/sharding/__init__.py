"""Devices and processes: meshes, where arrays lie, rows over devices, and who takes part."""
