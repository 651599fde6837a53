/* find.c - the built-in tables by name. */
#include "cpu/async.h"
#include "cpu/check.h"
#include "cpu/cpu_device.h"
#include "cpu/ref.h"

#include <string.h>

const ovlm_ops *ovlm_cpu_ops_find(const char *name)
{
    const ovlm_ops *const tables[] = {&ovlm_cpu_ops, &ovlm_ref_ops, &ovlm_async_ops,
                                      &ovlm_check_ops};
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) {
        if (strcmp(tables[i]->name, name) == 0) {
            return tables[i];
        }
    }
    return NULL;
}
