/* Product of float matrices, which the compiler turns into SSE. */
#include "bench.h"

#define SIDE 384

static float a[SIDE][SIDE], b[SIDE][SIDE], c[SIDE][SIDE];

static unsigned long long body(void)
{
    for (int i = 0; i < SIDE; i++) {
        for (int j = 0; j < SIDE; j++)
            c[i][j] = 0;
        for (int k = 0; k < SIDE; k++) {
            float factor = a[i][k];
            for (int j = 0; j < SIDE; j++)
                c[i][j] += factor * b[k][j];
        }
    }
    return (unsigned long long)c[SIDE / 2][SIDE / 3];
}

int main(void)
{
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++) {
            a[i][j] = (float)((i * 7 + j) % 31);
            b[i][j] = (float)((i + j * 5) % 29);
        }
    repeat("matrix", body);
    return 0;
}
