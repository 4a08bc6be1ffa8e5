"""What every layer may use: errors, environment variables, whole-or-absent files, lazy names, the policy."""
