/* The loops of a training step that a tensor library can only do in several passes over memory.
 *
 * Compiled for one number type at a time (-DREAL=float or double) by deep_components/kernels/__init__.py, which is also
 * where the formulas stand. Every function works on a range first .. last of independent pieces and writes to places
 * that no other range writes to: results do not depend on the number of threads. All arrays are contiguous, rows first,
 * unless a stride (in elements) is given.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define OUT_OF_MEMORY (-2)
#define BAD_INDEX (-1)

/* logits[b,n,l] = bias + sum_h weight[h] * max(history[b,l,h] + items[b,n,h], 0) where mask[b,l], else padding. */
int64_t attention_forward(int64_t first, int64_t last, int64_t N, int64_t L, int64_t H, const REAL *restrict history,
                          const REAL *restrict items, const REAL *restrict weight, const REAL *restrict bias,
                          const uint8_t *restrict mask, REAL padding, REAL *restrict logits) {
    REAL *columns = malloc((H + 1) * L * sizeof(REAL)); /* the valid positions' history, transposed to [H, count] */
    int64_t *place = malloc(L * sizeof(int64_t));
    if (!columns || !place) {
        free(columns);
        free(place);
        return OUT_OF_MEMORY;
    }
    REAL *restrict sums = columns + H * L;
    for (int64_t b = first; b < last; b++) {
        int64_t count = 0;
        for (int64_t l = 0; l < L; l++)
            if (mask[b * L + l]) place[count++] = l;
        for (int64_t c = 0; c < count; c++)
            for (int64_t h = 0; h < H; h++) columns[h * count + c] = history[(b * L + place[c]) * H + h];
        for (int64_t n = 0; n < N; n++) {
            const REAL *restrict item = items + (b * N + n) * H;
            for (int64_t c = 0; c < count; c++) sums[c] = 0;
            for (int64_t h = 0; h < H; h++) {
                const REAL shift = item[h], factor = weight[h];
                const REAL *restrict column = columns + h * count;
                for (int64_t c = 0; c < count; c++) {
                    REAL x = column[c] + shift;
                    sums[c] += factor * (x < 0 ? 0 : x); /* NaN stays NaN */
                }
            }
            REAL *restrict out = logits + (b * N + n) * L;
            for (int64_t l = 0; l < L; l++) out[l] = padding;
            for (int64_t c = 0; c < count; c++) out[place[c]] = sums[c] + *bias;
        }
    }
    free(columns);
    free(place);
    return 0;
}

/* grad_history[b,l,h] = sum_n active * grad[b,n,l] and grad_items[b,n,h] = sum_l active * grad[b,n,l], where active says
 * that the hidden unit's input is above 0; both still lack the factor weight[h]. A position whose gradient is 0, as that
 * of padding is, costs nothing. */
int64_t attention_backward(int64_t first, int64_t last, int64_t N, int64_t L, int64_t H, const REAL *restrict history,
                           const REAL *restrict items, const REAL *restrict grad, REAL *restrict grad_history,
                           REAL *restrict grad_items) {
    memset(grad_history + first * L * H, 0, (last - first) * L * H * sizeof(REAL));
    memset(grad_items + first * N * H, 0, (last - first) * N * H * sizeof(REAL));
    for (int64_t b = first; b < last; b++)
        for (int64_t n = 0; n < N; n++) {
            const REAL *restrict item = items + (b * N + n) * H;
            REAL *restrict to_item = grad_items + (b * N + n) * H;
            for (int64_t l = 0; l < L; l++) {
                const REAL passed = grad[(b * N + n) * L + l];
                if (passed == 0) continue;
                const REAL *restrict event = history + (b * L + l) * H;
                REAL *restrict to_event = grad_history + (b * L + l) * H;
                for (int64_t h = 0; h < H; h++) {
                    REAL value = event[h] + item[h] > 0 ? passed : 0;
                    to_event[h] += value;
                    to_item[h] += value;
                }
            }
        }
    return 0;
}

/* out[i, :] = table[ids[i], :]. BAD_INDEX when an id is not a row. */
int64_t gather(int64_t count, int64_t rows, int64_t d, const REAL *restrict table, const int64_t *restrict ids,
               int64_t id_stride, REAL *restrict out, int64_t out_stride) {
    for (int64_t i = 0; i < count; i++) {
        const int64_t id = ids[i * id_stride];
        if (id < 0 || id >= rows) return BAD_INDEX;
        for (int64_t k = 0; k < d; k++) out[i * out_stride + k] = table[id * d + k];
    }
    return 0;
}

/* table[ids[i], :] += grad[i, :], but nothing to the padding row. */
int64_t scatter_add(int64_t count, int64_t d, REAL *restrict table, const int64_t *restrict ids, int64_t id_stride,
                    const REAL *restrict grad, int64_t grad_stride, int64_t padding) {
    for (int64_t i = 0; i < count; i++) {
        const int64_t id = ids[i * id_stride];
        if (id == padding) continue;
        for (int64_t k = 0; k < d; k++) table[id * d + k] += grad[i * grad_stride + k];
    }
    return 0;
}

/* Bring rows[first .. last] of a table to step `now` as Adam without gradients would, and copy them to out. The drift
 * rules of step t are weights[t, :] and nodes[t, :]; kept1[k] and kept2[k] are what k steps leave of the moments. */
int64_t catch_up(int64_t first, int64_t last, int64_t d, const int64_t *restrict rows, REAL *restrict table,
                 REAL *restrict moment1, REAL *restrict moment2, int32_t *restrict brought_to, int64_t now,
                 int64_t num_nodes, const REAL *restrict weights, const REAL *restrict nodes,
                 const REAL *restrict kept1, const REAL *restrict kept2, REAL lr, REAL eps, REAL *restrict out) {
    const REAL *restrict weights_now = weights + now * num_nodes, *restrict nodes_now = nodes + now * num_nodes;
    for (int64_t i = first; i < last; i++) {
        if (i + 8 < last) { /* rows lie anywhere in memory: ask for them ahead */
            const int64_t ahead = rows[i + 8] * d;
            __builtin_prefetch(table + ahead, 1);
            __builtin_prefetch(moment1 + ahead, 1);
            __builtin_prefetch(moment2 + ahead, 1);
            __builtin_prefetch(brought_to + rows[i + 8], 1);
        }
        const int64_t row = rows[i], since = brought_to[row], k = now - since;
        REAL *restrict p = table + row * d, *restrict m = moment1 + row * d, *restrict v = moment2 + row * d;
        if (k > 0) {
            const REAL *restrict weights_then = weights + since * num_nodes, *restrict nodes_then = nodes + since * num_nodes;
            const REAL left1 = kept1[k], left2 = kept2[k], root_left = (REAL)sqrt(left2);
            for (int64_t c = 0; c < d; c++) {
                const REAL root = (REAL)sqrt(v[c]);
                REAL before = 0, after = 0;
                for (int64_t q = 0; q < num_nodes; q++) {
                    before += weights_then[q] / (root + eps * nodes_then[q]);
                    after += weights_now[q] / (root * root_left + eps * nodes_now[q]);
                }
                p[c] -= lr * m[c] * (before - left1 * after);
                m[c] *= left1;
                v[c] *= left2;
            }
            brought_to[row] = (int32_t)now;
        }
        for (int64_t c = 0; c < d; c++) out[i * d + c] = p[c];
    }
    return 0;
}

/* One Adam step, the `now`-th, of rows[first .. last], whose gradients are grad[first .. last, :]. */
int64_t adam_rows(int64_t first, int64_t last, int64_t d, const int64_t *restrict rows, REAL *restrict table,
                  REAL *restrict moment1, REAL *restrict moment2, int32_t *restrict brought_to, int64_t now,
                  const REAL *restrict grad, REAL one_minus_beta1, REAL beta2, REAL one_minus_beta2, REAL root_correction,
                  REAL step_size, REAL eps) {
    for (int64_t i = first; i < last; i++) {
        if (i + 8 < last) {
            const int64_t ahead = rows[i + 8] * d;
            __builtin_prefetch(table + ahead, 1);
            __builtin_prefetch(moment1 + ahead, 1);
            __builtin_prefetch(moment2 + ahead, 1);
            __builtin_prefetch(brought_to + rows[i + 8], 1);
        }
        const int64_t row = rows[i];
        REAL *restrict p = table + row * d, *restrict m = moment1 + row * d, *restrict v = moment2 + row * d;
        for (int64_t c = 0; c < d; c++) {
            const REAL g = grad[i * d + c];
            m[c] += one_minus_beta1 * (g - m[c]);
            v[c] = beta2 * v[c] + one_minus_beta2 * g * g;
            p[c] -= m[c] / ((REAL)sqrt(v[c]) / root_correction + eps) * step_size;
        }
        brought_to[row] = (int32_t)now;
    }
    return 0;
}
