// The torch that this module was built for, as a string in the file. effdense/ops/extension.py reads it there
// before it loads the module, which may fail under another torch.
#include <c10/macros/Export.h>
#include <torch/version.h>

// Exported, so that neither the compiler nor the linker drops what no code reads.
extern "C" C10_EXPORT const char effdense_built_for[];
const char effdense_built_for[] = "effdense was built for torch " TORCH_VERSION;
