// The row loops for the compiler's baseline instruction set, on any architecture.
#include "cpu/rows.h"

#define EFFDENSE_ISA baseline
#include "cpu/rows.inc"
