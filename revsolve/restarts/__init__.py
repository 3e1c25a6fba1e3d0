"""Restarts that come by themselves: when the gap between y and z has grown, or the field's fastest modes would have."""
