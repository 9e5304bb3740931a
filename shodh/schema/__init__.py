"""What the numbers mean: fields, domains, normalisation."""
