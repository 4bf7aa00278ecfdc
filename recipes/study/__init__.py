"""The paper's five observations (arXiv 2510.08565, section 3) in miniature."""
