// Which torch this module was built for, for effdense/ops/extension.py to read from the file itself: under
// another torch the module may not load, and then it cannot be asked.
#include <c10/macros/Export.h>
#include <torch/version.h>

// Exported, so that neither the compiler nor the linker drops what no code reads.
extern "C" C10_EXPORT const char effdense_built_for[];
const char effdense_built_for[] = "effdense was built for torch " TORCH_VERSION;
