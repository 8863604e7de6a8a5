/* Passes a message around a ring of all ranks and reduces over them; says what came out, from rank 0.
 *
 *   ranks N
 *   host RANK NAME       where each rank runs, one line a rank
 *   ring T               each rank added (rank + 1) squared to what came from its left
 *   sum A B              first and last element of an all-reduced array of ELEMENTS numbers
 *   max M NAME           the largest rank, found with its place, and the host it is on
 *
 * Ends with 1 when a rank sees an element that is not what all ranks together make.
 */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ELEMENTS 200000 /* 1.6 MB: more than a packet, and more than what is sent without asking first */

int main(int argc, char **argv)
{
    int rank, ranks, length, wrong = 0, all_wrong;
    char name[MPI_MAX_PROCESSOR_NAME] = "";

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    MPI_Get_processor_name(name, &length);

    char *names = malloc((size_t)ranks * sizeof name);
    double *mine = malloc(ELEMENTS * sizeof *mine), *all = malloc(ELEMENTS * sizeof *all);
    if (!names || !mine || !all)
        MPI_Abort(MPI_COMM_WORLD, 2);
    MPI_Gather(name, sizeof name, MPI_CHAR, names, sizeof name, MPI_CHAR, 0, MPI_COMM_WORLD);

    long token = 0, own = (long)(rank + 1) * (rank + 1);
    int left = (rank + ranks - 1) % ranks, right = (rank + 1) % ranks;
    if (rank == 0) {
        MPI_Send(&own, 1, MPI_LONG, right, 0, MPI_COMM_WORLD);
        MPI_Recv(&token, 1, MPI_LONG, left, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    } else {
        MPI_Recv(&token, 1, MPI_LONG, left, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
        token += own;
        MPI_Send(&token, 1, MPI_LONG, right, 0, MPI_COMM_WORLD);
    }

    for (int i = 0; i < ELEMENTS; i++)
        mine[i] = (double)(rank + 1) * (i + 1);
    MPI_Allreduce(mine, all, ELEMENTS, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
    for (int i = 0; i < ELEMENTS; i++)
        wrong += all[i] != (double)ranks * (ranks + 1) / 2 * (i + 1);
    MPI_Allreduce(&wrong, &all_wrong, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);

    struct { int value, rank; } highest, place = {rank, rank};
    MPI_Allreduce(&place, &highest, 1, MPI_2INT, MPI_MAXLOC, MPI_COMM_WORLD);

    if (rank == 0) {
        printf("ranks %d\n", ranks);
        for (int i = 0; i < ranks; i++)
            printf("host %d %s\n", i, names + (size_t)i * sizeof name);
        printf("ring %ld\nsum %.0f %.0f\n", token, all[0], all[ELEMENTS - 1]);
        printf("max %d %s\n", highest.value, names + (size_t)highest.rank * sizeof name);
        if (all_wrong)
            fprintf(stderr, "%d elements are wrong\n", all_wrong);
    }
    MPI_Finalize();
    return all_wrong != 0;
}
