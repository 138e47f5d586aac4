// Operators for any machine, in plain C++.
#include <vector>

#include "dispatch.h"
#include "support.h"

#define SILVERSHARD_ISA scalar
#define SILVERSHARD_TABLE scalar_operators
#include "vectors_scalar.h"
#include "operators.h"
