"""What every layer shares: errors, frozen configs and careful files."""
