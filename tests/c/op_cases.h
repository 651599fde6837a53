/* op_cases.h - random cases of every operation, and how they are run on a backend.
 *
 * A case holds its arguments on the host: tensors dense and float64, with values that the dtypes it
 * will be run in can hold exactly.  Running it places each member on a backend's device with random
 * strides, runs the passes and brings every member back as float64. */
#ifndef OVLM_TEST_OP_CASES_H
#define OVLM_TEST_OP_CASES_H

#include "backend/op_schema.h"
#include "backend/tensor.h"
#include "base/arena.h"
#include "base/rng.h"

#define OP_CASE_MEMBER(op, type) type op;
typedef union op_args {
    ovlm_scratch scratch;
    OVLM_OPS(OP_CASE_MEMBER)
} op_args;
#undef OP_CASE_MEMBER

typedef struct op_case {
    ovlm_op op;
    op_args args;
    ovlm_dtype storage; /* of what ops.h leaves to the model; the rest is float32  */
    bool pixels;        /* scale: x is uint8                                       */
    bool in_place;      /* outputs are put where the comments say that they may be */
    ovlm_arena arena;
} op_case;

/* Extents up to about `size`; zero and one are frequent. */
void op_case_draw(op_case *c, ovlm_op op, ovlm_dtype storage, int64_t size, ovlm_rng *rng);
void op_case_free(op_case *c);

bool op_has_backward(ovlm_op op);

/* The member of that name, or NULL. */
const ovlm_member *op_member(ovlm_op op, const char *name);

/* In args of that operation. */
ovlm_tensor *op_tensor(ovlm_op op, void *args, const char *name);

/* What a run leaves behind: arguments of the same form with every member as it was found. */
typedef struct op_result {
    op_args args;
    ovlm_arena arena;
} op_result;

/* Runs the forward and, with `backward`, then the backward.  float64: every tensor is float64, for
 * `ref`.  OVLM_E_INTERNAL: the operation wrote between the columns of a tensor. */
OVLM_NODISCARD ovlm_status op_case_run(const op_case *c, ovlm_queue *queue, bool float64,
                                       bool backward, ovlm_rng *rng, op_result *result,
                                       ovlm_err *err);
void op_result_free(op_result *result);

/* First element that differs between two runs of a case, to the bit: "dx[3]", or NULL. */
const char *op_result_difference(const op_case *c, const op_result *a, const op_result *b,
                                 char text[64]);

#endif
