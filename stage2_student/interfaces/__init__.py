"""Byte interfaces: how a student yields next-byte distributions. One file each, chosen by `student.interface`."""
