// One executable per program: QUANTC_SOURCE is the file, QUANTC_ENTRY its kernel.
#include QUANTC_SOURCE

#include "launch.h"

#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)

int main(int, char** paths) { return simt::launch(&QUANTC_ENTRY, TEXT(QUANTC_ENTRY), paths); }
