"""The other side: an ASGI application that holds weights and computes with them. Importing this loads no torch."""
