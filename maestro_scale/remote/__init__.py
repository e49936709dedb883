"""Reading from object stores and web servers through fsspec: clients, credentials, retries and errors of one kind."""
