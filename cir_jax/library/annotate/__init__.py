"""A benchmark of one's own photos, made as CIRCO was (SEARLE, arXiv 2303.15247, Appendix B).

Three steps: a reference and a target among what looks like it; what both share, and what differs;
all other right answers, among what several methods find and what looks like the target.
"""
