"""What the tests stand on: hosts to run in, fakes and artifacts."""
