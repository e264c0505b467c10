"""From composed configs to finished cells: plan, submit, watch. Imports no torch."""
