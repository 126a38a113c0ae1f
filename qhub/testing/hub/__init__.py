"""Holds the parts of the loopback Hub server: storage, endpoints, wire protocol, faults and client set-up."""
