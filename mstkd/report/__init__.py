"""`mstkd report`: evaluated runs as one page that people look at and pass on. It names no subject, host or path."""
