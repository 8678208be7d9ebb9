"""From a signed study to a run on real sites: submit, follow, find out how it ended, go on where it stood."""
