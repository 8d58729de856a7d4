"""The operators, one by one: what each computes, which implementation a tensor gets, and whether that is right here."""

from effdense.ops import dispatch, gpu_check

dispatch.ask_about_cards(gpu_check.usable)
