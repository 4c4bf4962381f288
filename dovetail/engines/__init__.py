"""What makes the tokens: one contract (`dovetail.types.ports.Engine`), one folder per engine."""
