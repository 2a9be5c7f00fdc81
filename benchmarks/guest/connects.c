/* Short TCP connections, one byte there and back each: connects ADDRESS PORT COUNT. */
#include "bench.h"
#include <arpa/inet.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    struct sockaddr_in to = {.sin_family = AF_INET};
    char byte = 'x';
    if (argc != 4)
        return 2;
    int count = atoi(argv[3]);
    inet_pton(AF_INET, argv[1], &to.sin_addr);
    to.sin_port = htons((unsigned short)atoi(argv[2]));
    for (int i = 0; i < count; i++) {
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(fd, (struct sockaddr *)&to, sizeof to) || write(fd, &byte, 1) != 1 || read(fd, &byte, 1) != 1)
            fail("connect");
        close(fd);
    }
    return 0;
}
