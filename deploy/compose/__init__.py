"""deploy.compose."""
