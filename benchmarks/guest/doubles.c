/* Square roots and divisions of doubles, each depending on the one before. */
#include "bench.h"
#include <math.h>

static unsigned long long body(void)
{
    double value = 2.0;
    for (long i = 1; i < 5000000; i++)
        value = sqrt(value + (double)i / (value + 1.0));
    return (unsigned long long)(value * 1e6);
}

int main(void)
{
    repeat("doubles", body);
    return 0;
}
