"""Human review: blind labeling of the review queue, on a page or in files."""
