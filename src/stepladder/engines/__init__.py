"""One file per engine: from a placed replica to the processes of each of its nodes."""
