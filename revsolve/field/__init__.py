"""The boundary around the user's field: a pure function of time, state and the tensors that it uses."""
