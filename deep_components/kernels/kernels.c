/* The loops of a training step that a tensor library can only do in several passes over memory.
 *
 * Compiled for one number type at a time (-DREAL=float or double) by deep_components/kernels/__init__.py, which is also
 * where the formulas stand. Threads are those of OpenMP: each takes a range first .. last of independent pieces and
 * writes to memory that no other writes to, so results do not depend on their number. All arrays are contiguous, rows
 * first, unless a stride (in elements) is given. Functions return 0, or what went wrong.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_num_threads() 1
#define omp_get_thread_num() 0
#endif

/* A block that every thread runs, with its own range of 0 .. count; `status`, 0 at first, becomes their sum. */
#define IN_PARALLEL _Pragma("omp parallel reduction(+ : status)")
#define MY_RANGE(count) \
    const int64_t threads = omp_get_num_threads(), mine = omp_get_thread_num(); \
    const int64_t first = (count) * mine / threads, last = (count) * (mine + 1) / threads

#define OUT_OF_MEMORY (-2)
#define BAD_INDEX (-1)
#define COMMON_DIM 8 /* the embedding dimension that most runs have: a loop of known length is several times faster */

static inline REAL relu(REAL x) { return 0 > x ? 0 : x; } /* NaN stays NaN */

/* Vectors of 32 bytes, by GCC's and clang's vector extension: the compiler makes of them what the processor has. */
#define MOST_POSITIONS 4
#define LANES ((int64_t)(32 / sizeof(REAL)))
typedef REAL vec __attribute__((vector_size(32)));
typedef __typeof__((vec){0} > (vec){0}) mask_vec;

static inline vec load(const REAL *from) {
    vec value;
    memcpy(&value, from, sizeof(value));
    return value;
}

static inline void store(REAL *to, vec value) { memcpy(to, &value, sizeof(value)); }

static inline vec where_positive(vec x, REAL value) {
    const mask_vec chosen = x > 0;
    return (vec)(chosen & (mask_vec)(value - (vec){0}));
}

/* logits[b,n,l] = bias + sum_h weight[h] * max(history[b,l,h] + items[b,n,h], 0) where mask[b,l], else padding. */
int64_t attention_forward(int64_t requests, int64_t N, int64_t L, int64_t H, const REAL *restrict history,
                          const REAL *restrict items, const REAL *restrict weight, const REAL *restrict bias,
                          const uint8_t *restrict mask, REAL padding, REAL *restrict logits) {
    int64_t status = 0;
    IN_PARALLEL {
        MY_RANGE(requests);
        REAL *columns = malloc((H + 1) * L * sizeof(REAL)); /* the valid positions' history, transposed to [H, count] */
        int64_t *position = malloc(L * sizeof(int64_t));
        if (!columns || !position) status = OUT_OF_MEMORY;
        REAL *restrict sums = columns + H * L;
        for (int64_t b = first; b < last && !status; b++) {
            int64_t count = 0;
            for (int64_t l = 0; l < L; l++)
                if (mask[b * L + l]) position[count++] = l;
            for (int64_t c = 0; c < count; c++)
                for (int64_t h = 0; h < H; h++) columns[h * count + c] = history[(b * L + position[c]) * H + h];
            for (int64_t n = 0; n < N; n++) {
                const REAL *restrict item = items + (b * N + n) * H;
                for (int64_t c = 0; c < count; c++) sums[c] = 0;
                int64_t h = 0;
                for (; h + 4 <= H; h += 4) { /* four at a time: the sums are read and written once for them */
                    const REAL *restrict column = columns + h * count;
                    const REAL s0 = item[h], s1 = item[h + 1], s2 = item[h + 2], s3 = item[h + 3];
                    const REAL w0 = weight[h], w1 = weight[h + 1], w2 = weight[h + 2], w3 = weight[h + 3];
                    for (int64_t c = 0; c < count; c++)
                        sums[c] += w0 * relu(column[c] + s0) + w1 * relu(column[count + c] + s1) +
                                   w2 * relu(column[2 * count + c] + s2) + w3 * relu(column[3 * count + c] + s3);
                }
                for (; h < H; h++)
                    for (int64_t c = 0; c < count; c++) sums[c] += weight[h] * relu(columns[h * count + c] + item[h]);
                REAL *restrict out = logits + (b * N + n) * L;
                for (int64_t l = 0; l < L; l++) out[l] = padding;
                for (int64_t c = 0; c < count; c++) out[position[c]] = sums[c] + *bias;
            }
        }
        free(columns);
        free(position);
    }
    return status;
}

/* What some positions l and one vector of hidden units pass on from all N items. `positions` is known when this is
 * compiled into its caller, so that everything of the history stays in registers. */
static inline __attribute__((always_inline)) void pass_on(const int64_t positions, int64_t N, int64_t L, int64_t H,
                                                          const REAL *restrict events, const REAL *restrict items,
                                                          const REAL *restrict passed, const int64_t *restrict position,
                                                          REAL *restrict to_events, REAL *restrict to_items) {
    vec event[MOST_POSITIONS], sum[MOST_POSITIONS];
    for (int64_t k = 0; k < positions; k++) {
        event[k] = load(events + position[k] * H);
        sum[k] = (vec){0};
    }
    for (int64_t n = 0; n < N; n++) {
        const vec item = load(items + n * H);
        vec to_item = load(to_items + n * H);
        for (int64_t k = 0; k < positions; k++) {
            const vec value = where_positive(event[k] + item, passed[n * L + position[k]]);
            sum[k] += value;
            to_item += value;
        }
        store(to_items + n * H, to_item);
    }
    for (int64_t k = 0; k < positions; k++) store(to_events + position[k] * H, sum[k]);
}

/* grad_weight[h] += rows[i,h] * grads[i,h] and grads[i,h] *= weight[h], for the rows that `position` names, or for all
 * rows where it is NULL. */
static inline void times_weight(int64_t count, int64_t H, const int64_t *restrict position, const REAL *restrict weight,
                                const REAL *restrict rows, REAL *restrict grads, REAL *restrict grad_weight) {
    for (int64_t i = 0; i < count; i++) {
        const int64_t row = (position ? position[i] : i) * H;
        for (int64_t h = 0; h < H; h++) {
            grad_weight[h] += rows[row + h] * grads[row + h];
            grads[row + h] *= weight[h];
        }
    }
}

/* grad_history[b,l,h] = weight[h] sum_n active * grad[b,n,l] and grad_items[b,n,h] = weight[h] sum_l active * grad[b,n,l],
 * where active says that the hidden unit's input is above 0. ReLU(x) = x where active, and x is the sum of its parts: so
 * is grad_weight[b,h], that of request b. Positions outside the mask take no part. */
int64_t attention_backward(int64_t requests, int64_t N, int64_t L, int64_t H, const REAL *restrict history,
                           const REAL *restrict items, const REAL *restrict weight, const uint8_t *restrict mask,
                           const REAL *restrict grad, REAL *restrict grad_history, REAL *restrict grad_items,
                           REAL *restrict grad_weight) {
    int64_t status = 0;
    IN_PARALLEL {
        MY_RANGE(requests);
        int64_t *position = malloc(L * sizeof(int64_t));
        if (!position) status = OUT_OF_MEMORY;
        memset(grad_history + first * L * H, 0, (last - first) * L * H * sizeof(REAL));
        memset(grad_items + first * N * H, 0, (last - first) * N * H * sizeof(REAL));
        memset(grad_weight + first * H, 0, (last - first) * H * sizeof(REAL));
        const int64_t whole = H - H % LANES; /* the units that fill vectors */
        for (int64_t b = first; b < last && !status; b++) {
            const REAL *restrict events = history + b * L * H, *restrict item = items + b * N * H;
            const REAL *restrict passed = grad + b * N * L;
            REAL *restrict to_events = grad_history + b * L * H, *restrict to_items = grad_items + b * N * H;
            int64_t count = 0;
            for (int64_t l = 0; l < L; l++)
                if (mask[b * L + l]) position[count++] = l;
            int64_t c = 0;
            for (; c + MOST_POSITIONS <= count; c += MOST_POSITIONS)
                for (int64_t h = 0; h < whole; h += LANES)
                    pass_on(MOST_POSITIONS, N, L, H, events + h, item + h, passed, position + c, to_events + h,
                            to_items + h);
            for (; c < count; c++)
                for (int64_t h = 0; h < whole; h += LANES)
                    pass_on(1, N, L, H, events + h, item + h, passed, position + c, to_events + h, to_items + h);
            for (c = 0; whole < H && c < count; c++) /* units that fill no vector */
                for (int64_t n = 0; n < N; n++)
                    for (int64_t h = whole; h < H; h++) {
                        const int64_t l = position[c];
                        const REAL value = events[l * H + h] + item[n * H + h] > 0 ? passed[n * L + l] : 0;
                        to_events[l * H + h] += value;
                        to_items[n * H + h] += value;
                    }
            times_weight(count, H, position, weight, events, to_events, grad_weight + b * H);
            times_weight(N, H, NULL, weight, item, to_items, grad_weight + b * H);
        }
        free(position);
    }
    return status;
}

/* x[i, :] = max(x[i, :] + bias[i / group, :], 0), in position; x has rows of `width`. */
int64_t bias_relu(int64_t groups, int64_t rows, int64_t group, int64_t width, const REAL *restrict bias,
                  REAL *restrict x) {
    int64_t status = 0;
    IN_PARALLEL {
        MY_RANGE(groups);
        for (int64_t g = first; g < last; g++) {
            const int64_t end = (g + 1) * group < rows ? (g + 1) * group : rows;
            const REAL *restrict own = bias + g * width;
            for (int64_t i = g * group; i < end; i++)
                for (int64_t k = 0; k < width; k++) x[i * width + k] = relu(x[i * width + k] + own[k]);
        }
    }
    return status;
}

/* passed[i, :] = grad[i, :] where out[i, :] > 0, else 0; sums[g, :] = sum of passed over the g-th group of rows. */
int64_t relu_backward(int64_t groups, int64_t rows, int64_t group, int64_t width, const REAL *restrict out,
                      const REAL *restrict grad, REAL *restrict passed, REAL *restrict sums) {
    int64_t status = 0;
    IN_PARALLEL {
        MY_RANGE(groups);
        for (int64_t g = first; g < last; g++) {
            const int64_t end = (g + 1) * group < rows ? (g + 1) * group : rows;
            REAL *restrict own = sums + g * width;
            for (int64_t k = 0; k < width; k++) own[k] = 0;
            for (int64_t i = g * group; i < end; i++)
                for (int64_t k = 0; k < width; k++) {
                    const REAL value = out[i * width + k] > 0 ? grad[i * width + k] : 0;
                    passed[i * width + k] = value;
                    own[k] += value;
                }
        }
    }
    return status;
}

/* One use of a table: count lists of `length` ids, one every id_stride, and as many rows of d numbers, one every
 * row_stride. A row of values is the table's, or the mean of those of its list, padding left out. */
typedef struct {
    int64_t count, length, rows, id_stride, row_stride, padding;
    const int64_t *ids;
    REAL *table, *values;
} use;

/* How many ids of a list are no padding; BAD_INDEX when one is not a row. */
static inline int64_t ids_there(const use *own, const int64_t *ids) {
    int64_t there = 0;
    for (int64_t g = 0; g < own->length; g++) {
        if (ids[g] < 0 || ids[g] >= own->rows) return BAD_INDEX;
        there += ids[g] != own->padding;
    }
    return there;
}

/* value[:] = the mean of table[ids[g], :] over the ids that are no padding; 0 where there is none. */
static int64_t mean_of_list(const use *own, int64_t d, const int64_t *restrict ids, REAL *restrict value) {
    const int64_t there = ids_there(own, ids);
    memset(value, 0, d * sizeof(REAL));
    for (int64_t g = 0; g < own->length && there > 0; g++)
        if (ids[g] != own->padding)
            for (int64_t k = 0; k < d; k++) value[k] += own->table[ids[g] * d + k];
    for (int64_t k = 0; k < d && there > 1; k++) value[k] /= (REAL)there;
    return there < 0 ? BAD_INDEX : 0;
}

/* table[ids[g], :] += value[:] / how many there are, for the ids that are no padding. */
static void add_to_list(const use *own, int64_t d, const int64_t *restrict ids, const REAL *restrict value) {
    const int64_t there = ids_there(own, ids);
    for (int64_t g = 0; g < own->length; g++)
        if (ids[g] != own->padding)
            for (int64_t k = 0; k < d; k++) own->table[ids[g] * d + k] += value[k] / (REAL)there;
}

/* values[i, :] = table[ids[i], :] for all uses, or the mean over a list. BAD_INDEX when an id is not a row. */
int64_t gather(int64_t uses, int64_t d, const use *restrict all) {
    int64_t status = 0;
    IN_PARALLEL {
        for (int64_t u = 0; u < uses; u++) {
            const use own = all[u];
            MY_RANGE(own.count);
            for (int64_t i = first; i < last; i++) {
                const int64_t id = own.ids[i * own.id_stride];
                if (own.length > 1)
                    status |= mean_of_list(&own, d, own.ids + i * own.id_stride, own.values + i * own.row_stride);
                else if (id < 0 || id >= own.rows)
                    status = BAD_INDEX;
                else if (d == COMMON_DIM)
                    memcpy(own.values + i * own.row_stride, own.table + id * COMMON_DIM, COMMON_DIM * sizeof(REAL));
                else
                    memcpy(own.values + i * own.row_stride, own.table + id * d, d * sizeof(REAL));
            }
        }
    }
    return status;
}

/* The gradient of gather: table[ids[i], :] += values[i, :], but nothing to the padding row; uses of one table stand together and are added in
 * their order by one thread. The ids have been through gather. */
int64_t scatter_add(int64_t uses, int64_t d, const use *restrict all) {
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t begin = 0; begin < uses; begin++) {
        if (begin && all[begin].table == all[begin - 1].table) continue; /* belongs to the uses before it */
        for (int64_t u = begin; u < uses && all[u].table == all[begin].table; u++) {
            const use own = all[u];
            for (int64_t i = 0; i < own.count; i++) {
                const int64_t id = own.ids[i * own.id_stride];
                if (own.length > 1) {
                    add_to_list(&own, d, own.ids + i * own.id_stride, own.values + i * own.row_stride);
                    continue;
                }
                if (id == own.padding) continue;
                if (d == COMMON_DIM)
                    for (int64_t k = 0; k < COMMON_DIM; k++)
                        own.table[id * COMMON_DIM + k] += own.values[i * own.row_stride + k];
                else
                    for (int64_t k = 0; k < d; k++) own.table[id * d + k] += own.values[i * own.row_stride + k];
            }
        }
    }
    return 0;
}

/* Rows lie anywhere in memory: ask for one ahead. */
#define ASK_FOR_ROW(row) \
    (__builtin_prefetch(table + (row) * d, 1), __builtin_prefetch(moment1 + (row) * d, 1), \
     __builtin_prefetch(moment2 + (row) * d, 1), __builtin_prefetch(brought_to + (row), 1))

/* Bring rows[0 .. count] of a table to step `now` as Adam without gradients would, and copy them to out. The drift
 * rules of step t are weights[t, :] and nodes[t, :]; kept1[k] and kept2[k] are what k steps leave of the moments. */
int64_t catch_up(int64_t count, int64_t d, const int64_t *restrict rows, REAL *restrict table,
                 REAL *restrict moment1, REAL *restrict moment2, int32_t *restrict brought_to, int64_t now,
                 int64_t num_nodes, const REAL *restrict weights, const REAL *restrict nodes,
                 const REAL *restrict kept1, const REAL *restrict kept2, REAL lr, REAL eps, REAL *restrict out) {
    int64_t status = 0;
    IN_PARALLEL {
        MY_RANGE(count);
        const REAL *restrict weights_now = weights + now * num_nodes, *restrict nodes_now = nodes + now * num_nodes;
        for (int64_t i = first; i < last; i++) {
            if (i + 8 < last) ASK_FOR_ROW(rows[i + 8]);
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
    }
    return status;
}

/* One Adam step, the `now`-th, of rows[0 .. count], whose gradients are grad[0 .. count, :]. */
int64_t adam_rows(int64_t count, int64_t d, const int64_t *restrict rows, REAL *restrict table,
                  REAL *restrict moment1, REAL *restrict moment2, int32_t *restrict brought_to, int64_t now,
                  const REAL *restrict grad, REAL one_minus_beta1, REAL beta2, REAL one_minus_beta2, REAL root_correction,
                  REAL step_size, REAL eps) {
    int64_t status = 0;
    IN_PARALLEL {
        MY_RANGE(count);
        for (int64_t i = first; i < last; i++) {
            if (i + 8 < last) ASK_FOR_ROW(rows[i + 8]);
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
    }
    return status;
}
