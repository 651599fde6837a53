/* cpu_load.c - rows to float32 and back, and rows over threads. */
#include "cpu/cpu_load.h"
#include "cpu/cpu_math.h"

OVLM_CPU_INLINE void load_bf16_body(float *to, const uint16_t *from, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        to[i] = ovlm_math_from_bf16(from[i]);
    }
}
OVLM_CPU_KERNEL(load_bf16, (float *to, const uint16_t *from, int64_t n), (to, from, n))

OVLM_CPU_INLINE void load_u8_body(float *to, const uint8_t *from, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        to[i] = (float)from[i];
    }
}
OVLM_CPU_KERNEL(load_u8, (float *to, const uint8_t *from, int64_t n), (to, from, n))

OVLM_CPU_INLINE void store_bf16_body(uint16_t *to, const float *from, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        to[i] = ovlm_math_to_bf16(from[i]);
    }
}
OVLM_CPU_KERNEL(store_bf16, (uint16_t *to, const float *from, int64_t n), (to, from, n))

void ovlm_cpu_load(float *to, const void *from, int64_t n, ovlm_dtype dtype)
{
    switch (dtype) {
    case OVLM_F32: memcpy(to, from, (size_t)n * sizeof *to); return;
    case OVLM_BF16: load_bf16(to, from, n); return;
    case OVLM_U8: load_u8(to, from, n); return;
    case OVLM_F64:
        for (int64_t i = 0; i < n; i++) {
            to[i] = (float)((const double *)from)[i];
        }
        return;
    case OVLM_F16:
    case OVLM_I32:
    case OVLM_I64:
    case OVLM_DTYPE_COUNT: return; /* refused by the validator */
    }
}

void ovlm_cpu_store(void *to, const float *from, int64_t n, ovlm_dtype dtype)
{
    if (dtype == OVLM_F32) {
        memcpy(to, from, (size_t)n * sizeof *from);
    } else if (dtype == OVLM_BF16) {
        store_bf16(to, from, n);
    } else if (dtype == OVLM_F64) {
        for (int64_t i = 0; i < n; i++) {
            ((double *)to)[i] = (double)from[i];
        }
    }
}

OVLM_CPU_INLINE void add_scaled_body(float *restrict to, const float *restrict from, float factor,
                                     int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        to[i] += factor * from[i];
    }
}
OVLM_CPU_KERNEL(add_scaled, (float *to, const float *from, float factor, int64_t n),
                (to, from, factor, n))

void ovlm_cpu_add_scaled(float *to, const float *from, float factor, int64_t n)
{
    add_scaled(to, from, factor, n);
}

OVLM_CPU_INLINE void dot_body(const float *x, const float *y, int64_t n, float *out)
{
    *out = ovlm_f8_dot(x, y, n);
}
OVLM_CPU_KERNEL(dot, (const float *x, const float *y, int64_t n, float *out), (x, y, n, out))

void ovlm_cpu_dot(const float *x, const float *y, int64_t n, float *out)
{
    dot(x, y, n, out);
}

static ovlm_status refuse_double(const char *op, const ovlm_member *members, int n,
                                 const void *args, ovlm_pass pass, ovlm_err *err)
{
    for (int i = 0; i < n; i++) {
        const ovlm_tensor *t = (const void *)((const char *)args + members[i].offset);
        if (members[i].kind == OVLM_MEMBER_TENSOR && t->cols > 0 && t->dtype == OVLM_F64 &&
            (pass == OVLM_PASS_MEASURE ||
             ovlm_member_role(&members[i], args, pass) != OVLM_UNUSED)) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "%s: %s is float64, which only the reference backend computes in; "
                             "use float32 or bfloat16",
                             op, members[i].name);
        }
    }
    return OVLM_OK;
}

ovlm_status ovlm_cpu_check_types(ovlm_op op, const void *args, ovlm_pass pass, ovlm_err *err)
{
    const ovlm_op_schema *schema = ovlm_op_schemas[op];
    OVLM_TRY(refuse_double(schema->name, schema->member, schema->member_n, args, pass, err));
    if (schema->list_bytes == 0) {
        return OVLM_OK;
    }
    int64_t n = *(const int64_t *)(const void *)((const char *)args + schema->n_offset);
    const char *list = *(const char *const *)(const void *)((const char *)args +
                                                            schema->list_offset);
    for (int64_t i = 0; i < n; i++) {
        OVLM_TRY(refuse_double(schema->name, schema->list_member, schema->list_member_n,
                               list + (size_t)i * schema->list_bytes, pass, err));
    }
    return OVLM_OK;
}

ovlm_status ovlm_cpu_fits(const char *what, int64_t columns, ovlm_err *err)
{
    if (columns > OVLM_CPU_ROW) {
        return OVLM_FAIL(err, OVLM_E_ARG, "%s must be at most %d on the CPU; got %lld", what,
                         (int)OVLM_CPU_ROW, (long long)columns);
    }
    return OVLM_OK;
}

typedef struct rows_job {
    const ovlm_cpu *cpu;
    ovlm_cpu_rows_body body;
    ovlm_cpu_chunk_body chunk_body;
    const void *ctx;
    int64_t rows, step;
} rows_job;

static void rows_piece(void *context, int64_t index, int64_t thread)
{
    const rows_job *job = context;
    int64_t first = index * job->step;
    int64_t count = job->rows - first < job->step ? job->rows - first : job->step;
    float *scratch = ovlm_cpu_scratch(job->cpu, thread);
    if (job->chunk_body != NULL) {
        job->chunk_body(job->ctx, index, first, count, scratch);
    } else {
        job->body(job->ctx, first, count, scratch);
    }
}

void ovlm_cpu_rows(ovlm_cpu *cpu, int64_t rows, int64_t row_elements, ovlm_cpu_rows_body body,
                   const void *ctx)
{
    int64_t step = OVLM_CPU_PIECE / (row_elements > 0 ? row_elements : 1);
    step = step < 1 ? 1 : step;
    rows_job job = {cpu, body, NULL, ctx, rows, step};
    ovlm_pool_run(cpu->pool, (rows + step - 1) / step, rows_piece, &job);
}

static void clear_rows(const void *context, int64_t first, int64_t count, float *scratch)
{
    (void)scratch;
    const ovlm_tensor *t = context;
    for (int64_t row = first; row < first + count; row++) {
        memset(ovlm_cpu_at(t, row, 0), 0, (size_t)(t->cols * ovlm_dtype_bytes(t->dtype)));
    }
}

void ovlm_cpu_clear(ovlm_cpu *cpu, const ovlm_tensor *tensor)
{
    ovlm_cpu_rows(cpu, tensor->rows, tensor->cols, clear_rows, tensor);
}

void ovlm_cpu_chunks_run(ovlm_cpu *cpu, int64_t rows, ovlm_cpu_chunk_body body, const void *ctx)
{
    rows_job job = {cpu, NULL, body, ctx, rows, ovlm_cpu_chunk_rows(rows)};
    ovlm_pool_run(cpu->pool, ovlm_cpu_chunks(rows), rows_piece, &job);
}

typedef struct fold_job {
    const float *partial;
    float *to;
    int64_t chunks, stride;
    float beta;
} fold_job;

static void fold_columns(const void *context, int64_t first, int64_t count, float *scratch)
{
    (void)scratch;
    const fold_job *job = context;
    float *to = job->to + first;
    if (job->beta == 0) {
        memset(to, 0, (size_t)count * sizeof *to);
    }
    for (int64_t chunk = 0; chunk < job->chunks; chunk++) {
        ovlm_cpu_add_scaled(to, job->partial + chunk * job->stride + first, 1, count);
    }
}

void ovlm_cpu_fold(ovlm_cpu *cpu, const float *partial, int64_t chunks, int64_t stride,
                   const ovlm_tensor *to, float beta)
{
    if (!ovlm_tensor_given(to)) {
        return;
    }
    fold_job job = {partial, to->data, chunks, stride, beta};
    ovlm_cpu_rows(cpu, to->cols, chunks + 1, fold_columns, &job);
}
