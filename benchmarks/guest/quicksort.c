/* Sorts 500,000 numbers with the C library's comparison callbacks. */
#include "bench.h"

#define COUNT 500000

static unsigned numbers[COUNT];

static int compare(const void *left, const void *right)
{
    unsigned a = *(const unsigned *)left, b = *(const unsigned *)right;
    return (a > b) - (a < b);
}

static void sort(unsigned *from, long count)
{
    while (count > 1) {
        unsigned pivot = from[count / 2];
        long low = 0, high = count - 1;
        while (low <= high) {
            while (compare(&from[low], &pivot) < 0)
                low++;
            while (compare(&pivot, &from[high]) < 0)
                high--;
            if (low <= high) {
                unsigned swapped = from[low];
                from[low++] = from[high];
                from[high--] = swapped;
            }
        }
        sort(from, high + 1);
        from += low;
        count -= low;
    }
}

static unsigned long long body(void)
{
    unsigned long long state = 88172645463325252ULL;
    for (long i = 0; i < COUNT; i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        numbers[i] = (unsigned)state;
    }
    sort(numbers, COUNT);
    return numbers[COUNT / 2];
}

int main(void)
{
    repeat("quicksort", body);
    return 0;
}
