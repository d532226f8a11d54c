"""Tools for a finished or unfinished dump: inspect, search, statistics, its card, transfer to a hub, clean-up.

May import all ground rooms but `pipeline.planning`."""
