/* objective.h - the losses that a vision encoder is pre-trained with (Seed1.5-VL, section 3.1),
 * with their gradients, on features in host memory.
 *
 * Each is a sum over rows divided by `total`, the rows of the global batch: parts of a batch add up
 * to the whole, to rounding, in loss and gradients.  Features are float32, or float64, which the
 * reference backend computes.  Products go through the op table of the queue that is given, in
 * chunks of rows; these calls wait for it. */
#ifndef OVLM_MODEL_OBJECTIVE_H
#define OVLM_MODEL_OBJECTIVE_H

#include "backend/backend.h"
#include "base/status.h"

/* Rows of a matrix on the host, dense: [rows,cols] in the objective's dtype. */
typedef struct ovlm_features {
    int64_t rows, cols;
    const void *data;
    void *slope;               /* the gradient, overwritten */
} ovlm_features;

/* Masked feature modelling: sum over masked rows of 1 - cos(student, teacher).  The teacher has no
 * gradient; rows that are not masked get a slope of 0. */
typedef struct ovlm_masked_cosine {
    ovlm_dtype dtype;
    ovlm_features student;
    const void *teacher;       /* [rows,cols]                                          */
    const uint8_t *masked;     /* [rows]                                               */
    double total;
    double loss;               /* out                                                  */
} ovlm_masked_cosine;

void ovlm_masked_cosine_run(ovlm_masked_cosine *args);

/* Sigmoid loss of image-text pairs (Zhai et al. 2023, eq. 1): -sum_ij log sigmoid(z_ij (scale
 * <x_i,y_j> + bias)), z = 1 where text j is offset + i, else -1; x and y are normalised here. */
typedef struct ovlm_siglip {
    ovlm_dtype dtype;
    ovlm_features image, text; /* a part's images; the whole batch's texts             */
    int64_t offset;            /* which text belongs to the first image                */
    double scale, bias, total;
    double loss, dscale, dbias; /* out                                                 */
} ovlm_siglip;

OVLM_NODISCARD ovlm_status ovlm_siglip_run(ovlm_queue *queue, ovlm_siglip *args, ovlm_err *err);

/* SuperClass (Huang et al. 2024, eq. 2): classification of a feature over the tokens of its
 * caption, -sum_c target_c log softmax(x w^T)_c.  Row i's targets are token[start[i]] .. with their
 * shares, which sum to 1. */
typedef struct ovlm_superclass {
    ovlm_dtype dtype;
    ovlm_features feature, weight; /* [rows,C], [V,C]                                  */
    const int64_t *start;      /* [rows+1]                                             */
    const int32_t *token;
    const double *share;
    double total;
    double loss;               /* out                                                  */
} ovlm_superclass;

OVLM_NODISCARD ovlm_status ovlm_superclass_run(ovlm_queue *queue, ovlm_superclass *args,
                                               ovlm_err *err);

#endif
