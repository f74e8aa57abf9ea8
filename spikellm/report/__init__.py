"""What lies in a run's or a sweep's folder, made readable: summaries, tables, pictures, pages. Reads files only."""
