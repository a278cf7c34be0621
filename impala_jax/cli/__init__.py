"""Commands of the program `impala`, and the parsing that they share."""
