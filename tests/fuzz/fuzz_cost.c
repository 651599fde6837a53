/* fuzz_cost.c - the cost calls: any numbers survive, fitted coefficients are finite and >= 0. */
#include "fuzz.h"

enum { ROWS = 12, LENGTHS = 40, DEGREES = 4 };

typedef struct sample {
    int64_t start[ROWS + 1], length[LENGTHS], degree[ROWS], degrees[DEGREES];
    double square[LENGTHS], seconds[ROWS], bytes[ROWS];
    ovlm_measurements rows;
} sample;

static void draw(sample *s, fuzz_input *in)
{
    int64_t rows = fuzz_range(in, 0, ROWS);
    memset(s, 0, sizeof *s);
    for (int64_t j = 0; j < DEGREES; j++) {
        s->degrees[j] = fuzz_bytes(in, 1) % 16 ? (int64_t)1 << j : fuzz_wild(in);
    }
    for (int64_t r = 0; r < rows; r++) {
        int64_t room = LENGTHS - s->start[r];
        int64_t n = fuzz_range(in, 0, room < 4 ? room : 4);
        s->start[r + 1] = s->start[r] + n;
        s->degree[r] = s->degrees[fuzz_bytes(in, 1) % DEGREES];
        s->seconds[r] = fuzz_wild_double(in);
        s->bytes[r] = 1 + fuzz_wild_double(in);
    }
    for (int64_t i = 0; i < s->start[rows]; i++) {
        s->length[i] = fuzz_wild(in);
        s->square[i] = fuzz_wild_double(in);
    }
    s->rows = (ovlm_measurements){
        .rows = rows, .start = s->start, .length = s->length, .degree = s->degree,
        .square = fuzz_bytes(in, 1) % 2 ? s->square : NULL, .seconds = s->seconds,
        .bytes = fuzz_bytes(in, 1) % 2 ? s->bytes : NULL};
}

static void check_coefficient(double value)
{
    MUST(isfinite(value) && value >= 0, "coefficient %g", value);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = {data, size};
    static sample s;
    double error[ROWS], bytes_error[ROWS], comm[DEGREES];
    bool use[6];
    ovlm_err err = {0};
    draw(&s, &in);
    for (int i = 0; i < 6; i++) {
        use[i] = fuzz_bytes(&in, 1) % 2;
    }
    ovlm_batch_cost batch = {0};
    ovlm_status status = ovlm_batch_cost_fit(&s.rows, use, &batch, error, &err);
    fuzz_check_status(status, &err);
    if (status == OVLM_OK) {
        MUST(ovlm_batch_cost_check(&batch, &err) == OVLM_OK, "%s", err.message);
    }
    ovlm_sequence_cost cost = {.memory_limit = HUGE_VAL, .heads = fuzz_range(&in, 0, 20),
                               .degree_n = fuzz_range(&in, 0, DEGREES), .degree = s.degrees};
    status = ovlm_sequence_cost_fit(&s.rows, &cost, comm, error, bytes_error, &err);
    fuzz_check_status(status, &err);
    if (status == OVLM_OK) {
        MUST(ovlm_sequence_cost_check(&cost, &err) == OVLM_OK, "%s", err.message);
        for (int64_t r = 0; r < s.rows.rows; r++) {
            MUST(error[r] >= -1 - 1e-9, "error %g", error[r]);
        }
        check_coefficient(cost.memory_per_token);
    }
    return 0;
}
