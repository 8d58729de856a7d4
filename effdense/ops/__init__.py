"""The operators, one by one: what each computes, which implementation a tensor gets, and whether that is right here."""
