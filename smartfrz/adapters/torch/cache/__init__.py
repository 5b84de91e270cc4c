"""Keep the outputs of a frozen prefix, so that it need not run again for the same samples."""
