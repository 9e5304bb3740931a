"""What every room uses: errors, files, seeds, the command line, ranks."""
