"""The CPU operators under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""
