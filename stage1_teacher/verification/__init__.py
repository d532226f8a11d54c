"""`bld verify`: whether a dump is sound, and whether its teacher still says what it holds.

May import every other room of the stage but `ray`."""
