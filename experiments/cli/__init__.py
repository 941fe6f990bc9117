"""The command line: `arguments` says what can be typed, `main` parses and answers, `verbs` do the work."""
