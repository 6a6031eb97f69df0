"""Several members in one model: where their tokens stand, how they answer, which are left out."""
