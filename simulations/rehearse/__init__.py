"""A study rehearsed at one hospital: the whole run on its own recordings, with no coordinator and no network."""
