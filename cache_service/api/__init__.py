"""The service: HTTP in, rows, builds and pages out. Never imports torch outside its workers."""
