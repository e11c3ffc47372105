// The part of the interface that both libraries share.

#include "swkernels.h"

int swk_interface_version(void) { return SWK_INTERFACE_VERSION; }

const char* swk_status_text(int status) {
  switch (status) {
    case SWK_OK: return "success";
    case SWK_BAD_DTYPE: return "it does not take this type of elements";
    case SWK_BAD_ACTIVATION: return "expected silu, gelu, gelu_tanh or relu";
    case SWK_BAD_SIZE: return "a size is negative or a pointer that holds elements is null";
    case SWK_BAD_TOKEN: return "a token index lies outside [0, 2^32 - 2]";
    case SWK_BAD_ISA: return "this CPU or this build lacks the instruction set";
    case SWK_OUT_OF_MEMORY: return "out of memory";
    case SWK_CUDA_ERROR: return "CUDA error";
    case SWK_BAD_INDEX: return "a row or a column lies outside the matrix";
    case SWK_NOT_A_NUMBER: return "the input holds a NaN";
    default: return "unknown status";
  }
}
