"""The command `optimum-cli export qvlm`."""
