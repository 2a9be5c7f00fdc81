"""The door between Python and Rust."""
