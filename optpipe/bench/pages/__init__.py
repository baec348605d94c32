"""What people and tools read: report.html, report.md, its schema, comparisons, sweeps."""
